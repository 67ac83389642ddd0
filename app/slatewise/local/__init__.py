"""A ranker in this process, with the methods of the client and without HTTP: `slatewise.load`."""
