"""Colours of the pictures in the documentation, which are drawn on a transparent background.

Each has a contrast of about 4.3 to 1 with white and with #0d1117, the dark page of code hosts. No colour has a higher contrast with both:
the product of the two contrasts is that of white with #0d1117, 18.9.
"""

GREY, BLUE, PURPLE, RED = "#737b86", "#2577e8", "#9159ef", "#d9480f"
