"""Tools as clients offer them, as templates show them and as constraints on what is said."""
