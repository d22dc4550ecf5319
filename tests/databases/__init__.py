"""Databases for tests: servers of one's own, migrations run on a database, devices in it, its connections, its dump."""
