"""How one client learns: the requests that client code makes, and how many clients' requests run in one step."""
