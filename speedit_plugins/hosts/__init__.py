"""The plugin: one file for each place where a host draws t, and folders of what these share."""
