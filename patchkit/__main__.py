"""``python -m patchkit``: the command line, also for launchers of several processes."""

from patchkit.cli.main import main

if __name__ == "__main__":
    main()
