"""The verbs: one graph pass per file, imported as ``kdlsq_fx.passes``."""

if __name__ != "kdlsq_fx.passes":
    raise ImportError("import this package as kdlsq_fx.passes; a second copy would split the op table")
