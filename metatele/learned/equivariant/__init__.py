"""A learned optimizer for networks of any shape: teleport, step, pull back.

Read :mod:`~metatele.learned.equivariant.reference` first: the whole step in plain formulas. The fast step is the same
in parts, from what is read to what is changed: ``observation`` (what a pass tells), ``moments`` and ``spectrum``
(second moments and teleports made of them), ``controller`` (what an LSTM sees and sets), ``direction``, ``guard``,
joined in ``step``; ``states`` is what is remembered, ``opening`` the teleport before the first step, ``optimizer`` the
module with the meta-parameters.
"""
