"""Keys and values of shared prefixes, computed and stored once."""
