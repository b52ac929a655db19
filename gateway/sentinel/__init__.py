"""Bad output is noticed: what a whole answer says is read, held to a few rules, and hosts are compared by how often theirs break them."""
