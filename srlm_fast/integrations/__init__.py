"""Our ops inside other trainers. Nothing of srlm_fast imports these modules."""
