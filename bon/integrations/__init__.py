"""bon inside other people's libraries, one module for each; importing a module does not import the library."""
