"""A live page on this machine over run folders: what runs, how it learns, who answers, and what it costs."""
