"""The experiment configs, packaged as `speedit_plugins.configs`."""
