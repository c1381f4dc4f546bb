"""Federated methods: one file each, in folders named as the chapters of the survey."""
