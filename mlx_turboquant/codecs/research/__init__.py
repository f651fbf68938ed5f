"""Codecs that exist to be compared with, under names that begin with ``research.``.

They work wherever a codec does, but no option lists them and the saved format does not
promise to read what they wrote.
"""
