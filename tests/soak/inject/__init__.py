"""What a soaked server is made to do wrong."""
