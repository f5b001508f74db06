"""The two towers of Florence: images and texts into one space of unit vectors (section 2.3)."""
