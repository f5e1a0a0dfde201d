"""A plugin that ends the program where it is imported."""

import sys

sys.exit("this machine has no licence")
