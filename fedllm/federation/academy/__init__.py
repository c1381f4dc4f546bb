"""A federation over Academy: each site is an agent of its own, reached through an exchange of mailboxes."""
