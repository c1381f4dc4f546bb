"""Privacy as layers: each changes what leaves a client or the server, and keeps one ledger of what that gave away."""
