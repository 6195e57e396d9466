"""Bundles: the folder that ``nattrace capture`` and ``nattrace bundle`` leave.

The manifest as data (`manifest`) and how a bundle is written (`writing`). Reading one as a SOURCE is ingest's
(`nattrace.ingest.bundles`); what ``context/`` means is not known here: its files are carried along as they are.
"""
