//! Typed calls to a Samepage server, over its unix socket.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dedup::MergedNow;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::fault::FaultBody;
use crate::model::{Domain, DomainReply, Version, VmDescription, VmMerge};
use crate::reply::CONSOLE_PROTOCOL;
use crate::request::{ActionBody, ActionType, DesiredState, MergePatch, StateBody};

/// The raw two-way stream of a VM's console.
pub type ConsoleConnection = TokioIo<hyper::upgrade::Upgraded>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens on the socket.
    #[error("no server on {} ({source}); start one with `samepage serve`", socket.display())]
    NoServer {
        /// The socket's path.
        socket: PathBuf,
        /// Why connecting failed.
        source: std::io::Error,
    },
    /// The server refused; its own words.
    #[error("{message}")]
    Fault {
        /// HTTP status.
        status: StatusCode,
        /// The reply's `fault_message`.
        message: String,
    },
    /// The connection broke, or the other side does not speak HTTP.
    #[error("{request}: {source}")]
    Http {
        /// Method and path.
        request: String,
        /// What happened.
        source: hyper::Error,
    },
    /// The reply is not what this version of Samepage sends.
    #[error("{request}: unexpected reply: {message}")]
    Reply {
        /// Method and path.
        request: String,
        /// What is wrong with it.
        message: String,
    },
}

/// A server's address. Each call is a connection of its own: on a unix socket that costs
/// microseconds, and there is no idle connection to go stale between two calls.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Of the server on `socket`; nothing is connected yet.
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client {
            socket: socket.into(),
        }
    }

    /// The server's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /version`
    ///
    /// # Errors
    /// See [`ClientError`]; so for every call.
    pub async fn version(&self) -> Result<Version, ClientError> {
        self.get("/version").await
    }

    /// `GET /vms`
    pub async fn list_vms(&self) -> Result<Vec<VmDescription>, ClientError> {
        self.get("/vms").await
    }

    /// `GET /vms/{id}`
    pub async fn describe_vm(&self, id: &str) -> Result<VmDescription, ClientError> {
        self.get(&format!("/vms/{id}")).await
    }

    /// `PUT /vms/{id}` with a Firecracker config.
    pub async fn create_vm(&self, id: &str, config: &impl Serialize) -> Result<(), ClientError> {
        let path = format!("/vms/{id}");
        self.send(&Method::PUT, &path, config).await?;
        Ok(())
    }

    /// `DELETE /vms/{id}`
    pub async fn delete_vm(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/vms/{id}");
        self.call(&Method::DELETE, &path, Bytes::new()).await?;
        Ok(())
    }

    /// `PUT /vms/{id}/actions`
    pub async fn act(&self, id: &str, action_type: ActionType) -> Result<(), ClientError> {
        let path = format!("/vms/{id}/actions");
        self.send(&Method::PUT, &path, &ActionBody { action_type })
            .await?;
        Ok(())
    }

    /// `PUT /vms/{id}/actions` with `MergeNow`
    pub async fn merge_now(&self, id: &str) -> Result<MergedNow, ClientError> {
        let body = ActionBody {
            action_type: ActionType::MergeNow,
        };
        let path = format!("/vms/{id}/actions");
        let reply = self.send(&Method::PUT, &path, &body).await?;
        parse(&format!("PUT {path}"), &reply)
    }

    /// `PATCH /vms/{id}/vm`
    pub async fn set_vm_state(&self, id: &str, state: DesiredState) -> Result<(), ClientError> {
        let path = format!("/vms/{id}/vm");
        self.send(&Method::PATCH, &path, &StateBody { state })
            .await?;
        Ok(())
    }

    /// `GET /vms/{id}/merge`
    pub async fn vm_merge(&self, id: &str) -> Result<VmMerge, ClientError> {
        self.get(&format!("/vms/{id}/merge")).await
    }

    /// `GET /merge`
    pub async fn list_domains(&self) -> Result<BTreeMap<String, DomainReply>, ClientError> {
        self.get("/merge").await
    }

    /// `GET /merge/{domain}`
    pub async fn describe_domain(&self, domain: &str) -> Result<Domain, ClientError> {
        self.get(&format!("/merge/{domain}")).await
    }

    /// `PATCH /merge/{domain}`; with `run: unmerge` it returns when no page is shared any more.
    pub async fn patch_domain(&self, domain: &str, patch: &MergePatch) -> Result<(), ClientError> {
        let path = format!("/merge/{domain}");
        self.send(&Method::PATCH, &path, patch).await?;
        Ok(())
    }

    /// `GET /vms/{id}/console`: what the console has shown, as far as it is kept.
    pub async fn console_history(&self, id: &str) -> Result<Bytes, ClientError> {
        let path = format!("/vms/{id}/console");
        self.call(&Method::GET, &path, Bytes::new()).await
    }

    /// `GET /vms/{id}/console` with an upgrade to the raw stream.
    pub async fn console_stream(&self, id: &str) -> Result<ConsoleConnection, ClientError> {
        let path = format!("/vms/{id}/console");
        let upgrade = [(CONNECTION, "Upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
        let builder = upgrade
            .into_iter()
            .fold(Request::get(&path), |builder, (name, value)| {
                builder.header(name, value)
            });
        let mut response = self.exchange(&path, builder, Bytes::new()).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let status = response.status();
            let body = collect(&path, response).await?;
            return Err(refusal(&path, status, &body));
        }
        let upgraded = hyper::upgrade::on(&mut response).await;
        upgraded
            .map(TokioIo::new)
            .map_err(|source| ClientError::Http {
                request: path,
                source,
            })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self.call(&Method::GET, path, Bytes::new()).await?;
        parse(&format!("GET {path}"), &body)
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        value: &impl Serialize,
    ) -> Result<Bytes, ClientError> {
        let body = serde_json::to_vec(value).map_err(|error| ClientError::Reply {
            request: format!("{method} {path}"),
            message: error.to_string(),
        })?;
        self.call(method, path, body.into()).await
    }

    /// One request and the body of its reply.
    ///
    /// # Errors
    /// [`ClientError::Fault`] for every status but 2xx.
    pub async fn call(
        &self,
        method: &Method,
        path: &str,
        body: Bytes,
    ) -> Result<Bytes, ClientError> {
        let mut builder = Request::builder().method(method).uri(path);
        if !body.is_empty() {
            builder = builder.header(CONTENT_TYPE, "application/json");
        }
        let response = self.exchange(path, builder, body).await?;
        let status = response.status();
        let body = collect(path, response).await?;
        if status.is_success() {
            return Ok(body);
        }
        Err(refusal(path, status, &body))
    }

    async fn exchange(
        &self,
        path: &str,
        builder: hyper::http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let http = |source| ClientError::Http {
            request: path.to_owned(),
            source,
        };
        let request = builder.header(HOST, "localhost").body(Full::new(body));
        let request = request.map_err(|error| ClientError::Reply {
            request: path.to_owned(),
            message: error.to_string(),
        })?;
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::NoServer {
            socket: self.socket.clone(),
            source,
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(http)
    }
}

async fn collect(path: &str, response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collected = response.into_body().collect().await;
    let collected = collected.map_err(|source| ClientError::Http {
        request: path.to_owned(),
        source,
    })?;
    Ok(collected.to_bytes())
}

fn parse<T: DeserializeOwned>(request: &str, body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Reply {
        request: request.to_owned(),
        message: error.to_string(),
    })
}

fn refusal(path: &str, status: StatusCode, body: &[u8]) -> ClientError {
    match serde_json::from_slice::<FaultBody>(body) {
        Ok(FaultBody { fault_message }) => ClientError::Fault {
            status,
            message: fault_message,
        },
        Err(_) => ClientError::Reply {
            request: path.to_owned(),
            message: format!("status {status} without a fault_message"),
        },
    }
}
