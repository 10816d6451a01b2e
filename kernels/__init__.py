"""Operations on tensors, one folder each: ``api.py`` guards and dispatches, ``reference.py`` is
plain torch. Nothing in here knows a method, a model or a layout."""
