"""Commands that ask a server or rank in process: `rank`, `batch` and `doctor`."""
