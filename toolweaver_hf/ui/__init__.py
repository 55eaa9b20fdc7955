"""A page in the browser: how a query's tools are found, what an agent does, and where the tools lie."""
