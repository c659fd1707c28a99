"""Programs of other frameworks that Fulcrum is measured against; each runs in an environment of its own."""
