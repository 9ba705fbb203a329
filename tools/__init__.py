"""What is run by hand, from the repository's root: python tools/NAME.py"""
