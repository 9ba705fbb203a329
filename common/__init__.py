"""Plumbing that the stages share, a room for each kind: no loss, no sampling, no architecture."""
