"""The hosted models' HTTP interface, served locally (extra ``serve``)."""
