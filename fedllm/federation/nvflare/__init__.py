"""A federation over NVFlare: keys, server, sites, and the job processes."""
