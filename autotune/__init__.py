"""Which kernel runs a problem, with which configuration."""
