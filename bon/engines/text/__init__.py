"""Messages to token ids and back: rendering, encoding without control tokens, decoding as it streams."""
