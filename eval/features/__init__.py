"""Networks whose features a distribution is measured by."""
