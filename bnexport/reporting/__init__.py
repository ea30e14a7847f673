"""Results made readable: terminal tables, one HTML page, figures."""
