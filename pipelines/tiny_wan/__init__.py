"""The embedded model ``tiny-wan``: its world, its recipe, its weights."""
