"""How fast the mixers are, beside what a user would write or pick instead."""
