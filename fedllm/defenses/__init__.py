"""Reducers and layers that withstand wrong or hostile replies."""
