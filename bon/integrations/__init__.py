"""bon inside other people's libraries, one module for each."""
