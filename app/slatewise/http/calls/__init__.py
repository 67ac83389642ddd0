"""The ranking calls of other servers, as dialects: one file for each call. They rank item ids, never texts."""
