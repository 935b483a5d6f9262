# Of every server in the tests, so that six of them fit a small machine: they hold a few thousand tokens.
CACHE_BYTES = 1 << 28
