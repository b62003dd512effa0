//! `awskms:` URIs, in the gocloud.dev forms.

use std::fmt;

use super::{BadUri, bad, decode_text, shown};

/// A key of AWS KMS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsKey {
    /// What `KeyId` in a request may be: an ARN, a key id, or `alias/NAME`. Only an ARN says which key for ever; the
    /// others are resolved to one when a key is made, and the ARN is what is recorded and asked from then on.
    pub key: String,
    /// `region`, or the ARN's. `None`: the environment's.
    pub region: Option<String>,
}

impl AwsKey {
    /// Whether it is the ARN of a key itself, not of an alias.
    pub fn is_key_arn(&self) -> bool {
        self.key.starts_with("arn:") && !self.key.contains(":alias/")
    }
}

/// What comes after `awskms:`.
pub(super) fn parse(rest: &str) -> Result<AwsKey, BadUri> {
    const FORM: &str = "an AWS KMS key is written awskms:///ARN?region=REGION (or awskms://alias/NAME?region=REGION)";
    let Some(rest) = rest.strip_prefix("//") else { return bad(FORM) };
    if rest.contains('#') {
        return bad("an awskms:// URI has no `#` part");
    }
    let (key, query) = match rest.split_once('?') {
        Some((key, query)) => (key, Some(query)),
        None => (rest, None),
    };
    let mut region = None;
    for parameter in query.into_iter().flat_map(|query| query.split('&')) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        if name != "region" {
            return bad(format!("unknown parameter {} in an awskms:// URI: only `region` is known", shown(name)));
        }
        if region.is_some() {
            return bad("the parameter `region` is given twice");
        }
        let value = decode_text(value, "the region")?;
        check_region(&value)?;
        region = Some(value);
    }
    let key = decode_text(key, "the key's ARN or id")?;
    let key = match key.strip_prefix('/') {
        Some(arn) => {
            let in_arn = arn_region(arn)?;
            if region.as_ref().is_some_and(|region| *region != in_arn) {
                return bad(format!("the URI's region is not the ARN's, which is {in_arn}: give one or the same"));
            }
            region = Some(in_arn);
            arn
        }
        None if key.starts_with("arn:") => return bad("the ARN in an awskms:// URI comes after three slashes"),
        None => {
            match key.strip_prefix("alias/") {
                Some(alias) => check_alias(alias)?,
                None => check_id(&key)?,
            }
            &key
        }
    };
    Ok(AwsKey { key: key.to_owned(), region })
}

fn check_region(region: &str) -> Result<(), BadUri> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if region.is_empty() || region.len() > 64 || !region.bytes().all(good) {
        return bad("the region in an awskms:// URI is written as in us-east-1");
    }
    Ok(())
}

/// The region of an ARN that names a key or an alias.
fn arn_region(arn: &str) -> Result<String, BadUri> {
    const FORM: &str = "an ARN of a KMS key is written arn:aws:kms:REGION:ACCOUNT:key/ID";
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    let ["arn", partition, "kms", region, account, resource] = parts[..] else { return bad(FORM) };
    let word = |b: u8| b.is_ascii_lowercase() || b == b'-';
    if !partition.starts_with("aws") || !partition.bytes().all(word) {
        return bad(FORM);
    }
    check_region(region)?;
    if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
        return bad(FORM);
    }
    match resource.split_once('/') {
        Some(("key", id)) => check_id(id)?,
        Some(("alias", alias)) => check_alias(alias)?,
        _ => return bad(FORM),
    }
    Ok(region.to_owned())
}

/// A UUID, with `mrk-` before it (and without dashes) for a multi-region key.
fn check_id(id: &str) -> Result<(), BadUri> {
    if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return bad("the id of a KMS key holds only letters, digits and `-`");
    }
    Ok(())
}

fn check_alias(alias: &str) -> Result<(), BadUri> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'_' | b'-');
    if alias.is_empty() || alias.len() > 250 || !alias.bytes().all(good) {
        return bad("the alias of a KMS key holds only letters, digits, `/`, `_` and `-`");
    }
    Ok(())
}

impl fmt::Display for AwsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.key.starts_with("arn:") { "/" } else { "" };
        write!(f, "awskms://{slash}{}", self.key)?;
        match &self.region {
            Some(region) => write!(f, "?region={region}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::KeyUri;

    const ARN: &str = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    #[test]
    fn good_uris_parse_and_print() {
        let with_region = format!("awskms:///{ARN}?region=us-east-1");
        for (text, printed) in [
            (with_region.as_str(), with_region.as_str()),
            (&format!("awskms:///{ARN}"), &with_region),
            ("awskms://alias/vol1?region=eu-west-1", "awskms://alias/vol1?region=eu-west-1"),
            ("awskms://alias/team/vol_1", "awskms://alias/team/vol_1"),
            ("awskms://mrk-12ab", "awskms://mrk-12ab"),
            (
                "awskms:///arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/a",
                "awskms:///arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/a?region=us-gov-west-1",
            ),
        ] {
            let uri: KeyUri = text.parse().expect(text);
            assert_eq!(uri.to_string(), printed);
            assert_eq!(printed.parse::<KeyUri>(), Ok(uri));
        }
    }

    #[test]
    fn bad_uris_are_refused_with_a_reason() {
        for (text, reason) in [
            ("awskms:x", "awskms:///ARN"),
            ("awskms://", "holds only letters"),
            ("awskms:///", "an ARN of a KMS key"),
            ("awskms:///arn:aws:s3:us-east-1:111122223333:key/x", "an ARN of a KMS key"),
            ("awskms:///arn:aws:kms:us-east-1:1111:key/x", "an ARN of a KMS key"),
            ("awskms:///arn:aws:kms:us-east-1:111122223333:grant/x", "an ARN of a KMS key"),
            ("awskms:///arn:aws:kms:us east:111122223333:key/x", "as in us-east-1"),
            ("awskms:///arn:aws:kms:us-east-1:111122223333:key/x%2f", "holds only letters"),
            ("awskms://arn:aws:kms:us-east-1:111122223333:key/x", "three slashes"),
            ("awskms:///arn:aws:kms:us-east-1:111122223333:key/x?region=eu-west-1", "not the ARN's"),
            ("awskms://x?region=", "as in us-east-1"),
            ("awskms://x?region=a&region=a", "twice"),
            ("awskms://x?context_a=b", "unknown parameter `context_a`"),
            ("awskms://x?profile=p", "unknown parameter `profile`"),
            ("awskms://x#y", "no `#` part"),
            ("awskms://alias/", "the alias"),
            ("awskms://alias/a.b", "the alias"),
        ] {
            let line = text.parse::<KeyUri>().expect_err(text).to_string();
            assert!(line.contains(reason), "{text}: {line}");
        }
    }
}
