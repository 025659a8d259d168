"""Judges a backend: `pytest --pyargs compact_fast.conformance --backend NAME`.

Each check looks at one thing a backend can get wrong and says in words what it found; the
reference in float64 decides. `compact_fast.testing.check_backend` runs them all.
"""
