"""The command line: parses, calls patchkit, prints. Everything it does can be done from Python too."""
