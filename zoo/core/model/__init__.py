"""A model seen from outside: names, shapes, seams, rules, weights."""
