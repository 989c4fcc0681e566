"""Who may do what: principals, the rules of tools, and the guard that decides."""
