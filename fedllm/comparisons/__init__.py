"""Runs side by side: one recipe under several methods and settings, over seeds; which differences mean something."""
