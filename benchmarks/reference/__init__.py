"""The obvious implementations: whole passes, weight gradients in probes, copies in dictionaries, restore by adding.

What the authors' public code does, in our own words and without its leaks.  The mathematics is that of the product, so
that the gradients agree; only the cost differs.
"""
