"""One request and one answer of each kind, for the documentation.

They are made by the models themselves, so that none can be wrong; a field's examples are what these
objects have in it.
"""
