"""`python tools/main.py -c CONFIG -p PHASE [key=value ...]`: the same command line as `speedit`."""

from speedit_plugins.cli import command

if __name__ == "__main__":
    command()
