"""The pages in ``docs/results``, and the tables of other pages, made from the stored raw results.

``python -m benchmarks.pages`` writes them, ``--check`` says which are not what the results give.
"""
