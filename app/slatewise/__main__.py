"""Makes `python -m slatewise` run the command `slatewise`."""

from slatewise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
