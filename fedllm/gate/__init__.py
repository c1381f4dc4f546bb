"""What is looked at before text leaves a site: copies of its rows, personal data, where synthetic rows come from."""
