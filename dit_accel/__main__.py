"""``python -m dit_accel``: the command line."""

from dit_accel.cli import main

if __name__ == "__main__":
    main()
