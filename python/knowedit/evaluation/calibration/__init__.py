"""Calibration: settings for one model from measurements on it.

measure   what is tried, and what is measured
choose    what follows from it
shown     both as tables
"""
